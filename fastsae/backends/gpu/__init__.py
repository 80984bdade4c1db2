"""What the GPU backends share: how an op is made of stages, and the sizes and error bounds in between. No kernel here.

An op is a sequence of stages. A stage is what a backend computes itself, in a few launches on the current stream.
`stages` lists them all as protocols; kernels/stages.py (Triton) and backends/cuda/stages.py (csrc/cuda) have them.
One file per op orders its stages, the same for both: encode_topk, encode_above, encode_batch_topk, by_latent,
active_outer, update_latents. An op that is one stage (decode, decode_error, active_dot) has no file. `raw_ops` binds
all ops to one backend's stages; `accumulation` knows what a device's products lose.

    encoders   narrow -> product -> bounds say which latents may count -> exact scores of those -> the code
    update     the code's slots listed and sorted by latent -> long latents cut (pieces) -> each latent's rows updated

Begin with `encode_topk`: its docstring walks through the stages of an encoder, and the other encoders refer to it. Then
read `update_latents`. `stored_update` builds the update of rows that are too wide for the kernels from the other ops.
"""
