"""The `ragproj` command and the web page."""
