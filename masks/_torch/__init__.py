"""What stands between the library and PyTorch: graphs, ops, gradients, inputs."""
