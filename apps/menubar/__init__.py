"""A menu bar item that runs the server in a process of its own: `python -m mlx_flash.apps.menubar`."""
