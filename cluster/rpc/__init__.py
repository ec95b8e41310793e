"""The gRPC contract in Python: generated stubs, conversion to domain types, request checks, statuses."""
