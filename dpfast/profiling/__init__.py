"""Where a training step's time goes, by layer and by kernel."""

from dpfast.profiling._step import KernelTime, LayerTime, Profile, profile

__all__ = ["KernelTime", "LayerTime", "Profile", "profile"]
