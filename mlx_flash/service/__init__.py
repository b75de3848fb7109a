"""Runs the server as a service of this user: an agent of launchd on macOS, a user unit of systemd on Linux."""
