"""Where the ops lie in torch.ops: under the package's own name, so that copies of it load beside one another."""

__all__ = ["NAMESPACE"]

NAMESPACE = __name__.partition(".")[0]
