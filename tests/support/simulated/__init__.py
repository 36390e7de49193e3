"""A CUDA device on a machine without one: irtune and DeepSpeed's own CUDA code run on it end to end, on the CPU.

device.cpp, compiled by g++ once per torch, registers a device that calls itself cuda:0. It refuses operands on two
devices, notes every place where the host would wait for a GPU, and delivers non-blocking copies to pinned memory only
when somebody waits for them. nccl.py carries collectives over gloo and refuses what NCCL refuses.

What it cannot see: races between streams, real kernels, the choice of an attention kernel, CUDA code of bitsandbytes
and liger-kernel, NCCL itself.

Nothing is imported here: device.py must come before torch, so runs are made by server.py in processes of its own.
"""
