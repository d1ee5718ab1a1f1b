"""Ray Serve and HTTP: the processes around an engine, and the API in front of them."""
