"""Engines compute canvases. They know tokens and tensors; never Redis, gRPC or protobuf."""
