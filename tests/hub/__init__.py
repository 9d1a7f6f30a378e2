"""A Hub on the loopback, in parts; tests import it from `tests.hub_server`."""
