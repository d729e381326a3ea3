"""Reading a config, and checking it before anything is built."""
