"""A menu bar app that runs the server in a separate process: `python -m mlx_flash.apps.menubar`."""
