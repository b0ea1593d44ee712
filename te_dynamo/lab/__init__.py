"""The cost of a compiled step on a GPU that is not there: compiled by Inductor for it, run on fake tensors, every launch noted.

    estimate.py       `te_dynamo.estimate`, Inductor against te_fp8
    command.py        `python -m te_dynamo estimate`
    step.py           compiles and runs one step, and notes what it would launch
    pretend.py        makes a process believe in a GPU; shim.cpp: where that takes C++
    stand_in.py       a model and its inputs as fake tensors on that GPU
    isolated.py       a process for it alone
    launches.py       what is noted; operators.py of an operator, kernels.py and accesses.py of a Triton kernel
    roofline.py       the time of a launch
    ptxas.py          registers and spills of hand-written Triton kernels

docs/estimate.md says how far to believe it.
"""
