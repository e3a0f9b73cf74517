"""Every tolerance of the suite, each with its derivation."""

import torch

# clip_and_noise aims at C (1 - margin): csrc/math/clipping.h bounds the rounding of the norm and
# the weight by it. The twin has no margin, so a weight may differ by that much, relatively.
NORM_MARGIN = 2.0**-28
GIVEN_SINGLE_NORM_MARGIN = 2.0**-20

# Gradients below float64 are multiplied by a weight cut to 29 significant bits, toward zero
# (math::short_weight), so that products are exact: 2^-28 relative at most.
SHORT_WEIGHT = 2.0**-28

# Half a unit in the last place: the sum is taken in float64 and rounded once.
OUTPUT_ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}
# The same for results below the smallest normal number: half of the smallest subnormal one.
OUTPUT_UNDERFLOW = {torch.float64: 2.0**-1075, torch.float32: 2.0**-150}

# Twin and kernel each sum B terms and one noise term in float64, every partial sum rounded by at
# most 2^-53 of sum |w_b g_b|; 2^-40 covers B <= 4096 twice over.
SUMMATION = 2.0**-40

# Float32 noise against the exact transform of the same words, relative to max(1, |x|): about six
# roundings of 2^-24 in the logarithm, the root, the circle point and the product, 3.6e-7, and
# polynomials good to 3e-8. Measured over 2^24 samples: 2.9e-7 Gaussian, 1.3e-7 Laplace.
NOISE_SINGLE = 4e-7
# Float64 noise: a few roundings in the logarithm, root, sine and cosine, each < 2^-52 on the CPU
# and < 2^-51 on CUDA. Measured over 2^24 samples on the CPU: 4.5e-16.
NOISE_DOUBLE = 4e-15

# norms: P <= 2^14 terms in the tests, each partial sum rounded by 2^-53: 2^14 2^-53 = 2^-39.
NORM_RELATIVE = 2.0**-38


def output_dtype(grad_dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if grad_dtype == torch.float64 else torch.float32


def noise_error(dtype: torch.dtype) -> float:
    return NOISE_DOUBLE if dtype == torch.float64 else NOISE_SINGLE
