"""Torch's module hooks for one instance, and every touch of diffusers' internals."""
