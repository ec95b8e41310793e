"""What a running cluster tells about itself: metrics and traces. Names and seams here; exporters are injected."""
