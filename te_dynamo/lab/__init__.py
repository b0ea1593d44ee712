"""The cost of a compiled step on a GPU that is not present: Inductor compiles for it, the step runs on fake tensors, launches are recorded.

    estimate.py       `te_dynamo.estimate`, Inductor against te_fp8
    command.py        `python -m te_dynamo estimate`
    step.py           compiles and runs one step, and records what it would launch
    pretend.py        makes torch and Triton in a process believe that it has the GPU; shim.cpp: the part that needs C++
    stand_in.py       a model and its inputs as fake tensors on that GPU
    isolated.py       a separate process for it
    launches.py       what is recorded; operators.py for an operator, kernels.py and accesses.py for a Triton kernel
    roofline.py       the time of a launch
    ptxas.py          registers and spills of handwritten Triton kernels

docs/estimate.md says how accurate it is.
"""
