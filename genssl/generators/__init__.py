"""Generators: image conditioners and decoders, and their samplers."""

from __future__ import annotations

from genssl.registry import builtin

ENTRIES = [
    # tests/generators/diffusion/test_full_size.py counts the parts of a cost, a spec's `tflops` the whole.
    builtin(
        __name__,
        "stable_unclip",
        "diffusion.stable_unclip:StableUnCLIP",
        "Stable Diffusion unCLIP: image embedding in, image out; any diffusers folder or hub id",
        licence="CreativeML OpenRAIL++-M (Stable Diffusion 2.1); builtin:digits-unclip Apache-2.0",
        cost="48.7 TFLOP an image as unclip-paper, 91.7 as unclip, 4.24 at 256 px in 10 guided steps",
    ),
    builtin(
        __name__,
        "flow",
        "flow:Flow",
        "rectified flow on self-supervised features; train your own",
        licence="of what you train; builtin:digits-flow Apache-2.0",
        cost="0.00011 TFLOP an image as builtin:digits-flow in 4 steps",
    ),
    builtin(
        __name__,
        "icgan",
        "icgan.generator:ICGAN",
        "instance-conditioned GAN, one forward pass: official weights that you bring, or train your own",
        licence="CC BY-NC 4.0 (official weights); builtin:digits-icgan Apache-2.0",
        cost="0.146 TFLOP an image at 256 px, 0.042 at 128, 0.0145 at 64",
    ),
    builtin(
        __name__,
        "retrieval",
        "retrieval.generator:Retrieval",
        "no model: the source's nearest neighbours in a bank of images, the control for all of them",
    ),
    builtin(
        __name__,
        "image_variation",
        "diffusion.image_variation:ImageVariation",
        "Stable Diffusion image variations: CLIP embedding instead of a prompt",
        config="diffusion.configs:ImageVariationConfig",
        licence="CreativeML OpenRAIL-M (Stable Diffusion 1)",
    ),
    builtin(
        __name__,
        "ip_adapter",
        "diffusion.ip_adapter:IPAdapter",
        "Stable Diffusion 1.5 or SDXL with an IP-Adapter; few-step LoRAs (LCM, Hyper-SD)",
        config="diffusion.configs:IPAdapterConfig",
        licence="Apache-2.0 (IP-Adapter), OpenRAIL (Stable Diffusion)",
    ),
    builtin(
        __name__,
        "kandinsky",
        "diffusion.kandinsky:Kandinsky",
        "Kandinsky 2.2's decoder: CLIP bigG embedding in, image out, no text",
        config="diffusion.configs:KandinskyConfig",
        licence="Apache-2.0",
    ),
    builtin(
        __name__,
        "flux2_klein",
        "diffusion.flux2_klein:Flux2Klein",
        "FLUX.2 klein: reference image and one constant prompt, 4 steps",
        config="diffusion.configs:Flux2KleinConfig",
        licence="Apache-2.0 (klein 4B)",
    ),
]
