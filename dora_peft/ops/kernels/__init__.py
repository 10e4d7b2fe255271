"""Triton's kernels. Importing any module of this folder but options.py imports Triton.

linear, dropout, norm, sample   kernels with their launchers
elements, tuning, options       what these share: reading W0, configurations, options besides tensors
selfcheck, checking, guarded    a check of each kernel, what checks are made of, memory in which faults show
launch, prepared, plan          launches on the tensors' device, those looked up once, and a layer's by its layout
fused                           the linear layer made of them
operators                       the same as operators for torch.compile
"""
