"""What a newcomer and the tests use in place of the world: a gateway, a broker, a demonstration."""
