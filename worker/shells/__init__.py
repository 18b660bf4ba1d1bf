"""The thin outside: each module here is the one door to one outside library."""
