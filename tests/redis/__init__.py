"""The job state against a real redis-server."""
