"""Tools for PyTorch's machinery: graphs, ops, gradients, inputs."""
