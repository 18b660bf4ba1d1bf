"""What a newcomer and the tests use in place of real services: a gateway, a broker, a demonstration."""
