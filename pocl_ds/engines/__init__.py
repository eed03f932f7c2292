"""Engines that hold a model's parameters, run backward and update them: DeepSpeed ZeRO-3 and
plain PyTorch.
"""
