"""What is computed: functions of tensors; of a module at most its geometry or identity is asked.

choice, constants, torch_names      which implementation computes, and what the implementations share
selfcheck, passed                   whether a GPU's kernels can be trusted, and what is remembered of it on disk
linear, linear_autograd, options    the linear layer: for its callers, as an autograd function, and what that is given
linear_by_kernels, linear_parts     the same function by Triton's kernels, and what both are made of
scaled_sum                          c * (z - b) + s u B^T + b
products, chunks, workspace         which library multiplies, many tokens in parts, memory that is kept for it
dropout                             its mask
norm                                v = ||W0 + s B A|| and c = m / v
compose                             y = c z + b for other kinds of layer, and their low-rank branches
kept_output, overwritten, content   whether a kept output, a factor or a weight still holds what it held
merging                             W' and weighted sums of adapters
kernels/                            Triton's kernels
"""
