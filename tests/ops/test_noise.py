"""The noise generator: RFC 8439's vectors, the twin's exact transforms, the tail, same bits."""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from dpfast import NoiseSource, _native, clip_and_noise, reference
from tests import tolerances

MECHANISMS = ("gaussian", "laplace")
DTYPES = (torch.float32, torch.float64)


def draw(mechanism, dtype, count, device="cpu", *, seed=0, step=0):
    """Standard noise through the public call: an empty batch has nothing else."""
    source = NoiseSource(seed)
    source.load_state_dict({**source.state_dict(), "step": step})
    empty = torch.zeros(0, count, dtype=dtype, device=device)
    return clip_and_noise(
        empty, max_grad_norm=1.0, noise_multiplier=1.0, mechanism=mechanism, noise=source
    )


def key_words(key):
    return [int.from_bytes(key[i : i + 4], "little") for i in range(0, 32, 4)]


# --- ChaCha20 ---

COUNTING = bytes(range(32))
# key, counter, nonce, keystream: RFC 8439 sections 2.3.2 and 2.4.2 (two blocks, the second cut)
# and appendix A.1, test vectors 1 to 5.
VECTORS = [
    (
        COUNTING, 1, "000000090000004a00000000",
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    (
        COUNTING, 1, "000000000000004a00000000",
        "224f51f3401bd9e12fde276fb8631ded8c131f823d2c06e27e4fcaec9ef3cf78"
        "8a3b0aa372600a92b57974cded2b9334794cba40c63e34cdea212c4cf07d41b7",
    ),
    (
        COUNTING, 2, "000000000000004a00000000",
        "69a6749f3f630f4122cafe28ec4dc47e26d4346d70b98c73f3e9c53ac40c5945"
        "398b6eda1a832c89c167eacd901d7e2bf363",
    ),
    (
        bytes(32), 0, "00" * 12,
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    (
        bytes(32), 1, "00" * 12,
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    (
        bytes(31) + b"\x01", 1, "00" * 12,
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    (
        b"\x00\xff" + bytes(30), 2, "00" * 12,
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
    (
        bytes(32), 0, "00" * 11 + "02",
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
        "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("key", "counter", "nonce", "keystream"), VECTORS)
def test_chacha20_equals_rfc_8439(key, counter, nonce, keystream):
    nonce_words = key_words(bytes.fromhex(nonce) + bytes(20))[:3]
    native = _native.chacha20_block(key_words(key), counter, nonce_words)
    twin = reference.chacha20_block(key_words(key), torch.tensor([counter]), nonce_words)
    expected = bytes.fromhex(keystream)
    for words in (native, twin[0].tolist()):
        stream = b"".join(word.to_bytes(4, "little") for word in words)
        assert stream[: len(expected)] == expected


def test_chacha20_native_equals_twin_for_random_inputs():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        words = torch.randint(0, 2**32, (12,), generator=generator).tolist()
        twin = reference.chacha20_block(words[:8], torch.tensor(words[8:9]), words[9:])
        assert _native.chacha20_block(words[:8], words[8], words[9:]) == twin[0].tolist()


# --- against the exact transform of the same words ---


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (7, 2**32 - 1), (7, 2**32 + 5)])
def test_noise_equals_exact_transform_of_the_same_words(mechanism, dtype, seed, step, device):
    count = 1 << 19
    native = draw(mechanism, dtype, count, device, seed=seed, step=step).cpu().double()
    exact = reference.standard_noise(
        reference.seed_key(seed), step, 0, mechanism, count, double_precision=dtype == torch.float64
    )
    error = (native - exact).abs() / exact.abs().clamp(min=1.0)
    assert float(error.max()) < tolerances.noise_error(dtype)


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tensor", [0, 1, 1000, 2**31 - 1])
def test_noise_fill_equals_exact_transform_for_any_tensor_index(mechanism, dtype, tensor):
    key = reference.seed_key(3)
    native = _native.fill_noise(key_words(key), 9, tensor, mechanism, 1000, dtype=dtype)
    exact = reference.standard_noise(
        key, 9, tensor, mechanism, 1000, double_precision=dtype == torch.float64
    )
    error = (native.double() - exact).abs() / exact.abs().clamp(min=1.0)
    assert float(error.max()) < tolerances.noise_error(dtype)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_noise_in_both_precisions_comes_from_the_same_words(mechanism):
    single = draw(mechanism, torch.float32, 100_000).double()
    double = draw(mechanism, torch.float64, 100_000)
    # A radius word of at least 2^16 without its 32 further bits: u to 2^-17, -ln u to 2^-17; near
    # u = 1, where -ln u is as small as 2^-32, the radius moves by up to sqrt(2 2^-32) = 2^-15.5.
    assert float((single - double).abs().max()) < 2.0**-15


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 255, 256, 257, 5000])
def test_noise_of_an_element_does_not_depend_on_the_tensor_size(mechanism, count, device):
    whole = draw(mechanism, torch.float32, 5000, device)
    assert torch.equal(draw(mechanism, torch.float32, count, device), whole[:count])


# --- the tail ---

TAIL_BLOCKS = 1 << 19


@pytest.fixture(scope="module")
def tail():
    """Blocks among the first 2^19 that have a word below 2^16, with both sets of their words."""
    key = reference.seed_key(0)
    found = []
    for first in range(0, TAIL_BLOCKS, 1 << 16):
        words = reference.noise_words(key, 0, 0, first, 1 << 16)
        found += (first + (words < 1 << 16).any(dim=1).nonzero()[:, 0]).tolist()
    words = torch.cat([reference.noise_words(key, 0, 0, b, 1) for b in found])
    more = torch.cat([reference.noise_words(key, 0, 0, b, 1, extension=True) for b in found])
    return torch.tensor(found), words, more


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_noise_tail_uses_the_extension_words(mechanism, tail, device):
    blocks, words, more = tail
    transform = getattr(reference, f"{mechanism}_from_words")
    exact = transform(words, more)
    # Element of word w of block b.
    elements = blocks[:, None] // 16 * 256 + torch.arange(16) * 16 + blocks[:, None] % 16
    native = draw(mechanism, torch.float32, TAIL_BLOCKS * 16, device).cpu()[elements].double()
    error = (native - exact).abs() / exact.abs().clamp(min=1.0)
    assert float(error.max()) < tolerances.NOISE_SINGLE
    # With other extension words only the elements of words below 2^16 move, and those do.
    moved = transform(words, more ^ 0x80000000) != exact
    low = words < 1 << 16
    if mechanism == "gaussian":
        low = low[:, 0::2].repeat_interleave(2, dim=1)  # radius words; the pair shares them
    assert torch.equal(moved, low)
    assert int(low.sum()) > 60
    # The extension is seen in the native result: without it the error would be far larger.
    coarse = transform(words, torch.full_like(more, 1 << 31))
    assert float(((native - coarse).abs() / exact.abs().clamp(min=1.0)).max()) > 1e-6


# Found by searching 2^30 blocks under the key of seed 0: (step, block, word, its value).
RARE = [
    (1159248, 100, 10, 0),
    (3920134, 90, 0, 2),
    (2885303, 60, 6, 3),
    (388166, 27, 4, 4),
    (2129327, 118, 13, 0),
    (3183331, 192, 13, 1),
    (1455593, 154, 7, 5),
]


@pytest.mark.parametrize(("step", "block", "word", "value"), RARE)
@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_of_rarest_words_equals_exact_transform(
    step, block, word, value, mechanism, dtype, device
):
    key = reference.seed_key(0)
    assert int(reference.noise_words(key, step, 0, block, 1)[0, word]) == value
    element = block // 16 * 256 + word * 16 + block % 16
    pair = [element, element + 16 if word % 2 == 0 else element - 16]
    native = draw(mechanism, dtype, 4096, device, step=step).cpu().double()[pair]
    exact = reference.standard_noise(
        key, step, 0, mechanism, 4096, double_precision=dtype == torch.float64
    )[pair]
    error = (native - exact).abs() / exact.abs().clamp(min=1.0)
    assert float(error.max()) < tolerances.noise_error(dtype)
    if mechanism == "laplace":
        assert float(native[0].abs()) > math.log(2.0**32 / 6)  # 20.4
    elif word % 2 == 0:
        assert float(native.square().sum()) > 2 * math.log(2.0**32 / 5)  # 6.4 sigma


def test_noise_largest_value_lies_beyond_8_sigma():
    zero = torch.zeros(1, 16, dtype=torch.int64)
    for double_precision in (False, True):
        largest = reference.gaussian_from_words(zero, zero, double_precision=double_precision)
        assert float(largest[0, 0]) == pytest.approx(math.sqrt(2 * 65 * math.log(2)), rel=1e-12)
        assert float(largest[0, 0]) > 8.0
        laplace = reference.laplace_from_words(zero, zero, double_precision=double_precision)
        # exp(-44) / 2 is as rare as 8.7 sigma of a Gaussian.
        assert float(laplace[0, 0]) > 44.0
    # Without the extension a word of 0 would end at 6.76 sigma.
    coarse = math.sqrt(2 * math.log(2.0**33))
    assert coarse < 6.8


def test_noise_smallest_radius_is_accurate():
    words = torch.full((1, 16), 2**32 - 1)
    exact = reference.gaussian_from_words(words, words)
    assert float(exact.square()[0, :2].sum()) == pytest.approx(2 * 0.5 * 2.0**-32, rel=1e-9)
    assert abs(float(reference.laplace_from_words(words, words)[0, 0])) == pytest.approx(
        2.0**-32, rel=1e-9
    )


# --- same bits everywhere ---

BITS = """
import hashlib, json, torch
from dpfast import NoiseSource, _native, clip_and_noise
def digest(*tensors):
    h = hashlib.sha256()
    for t in tensors:
        h.update(t.contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()
result = {}
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    got = []
    for mechanism in ("gaussian", "laplace"):
        for dtype in (torch.float32, torch.float64):
            got.append(digest(_native.fill_noise(range(8), 3, 1, mechanism, 300001, dtype=dtype)))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        g = torch.Generator().manual_seed(1)
        grads = [torch.randn(70, n, generator=g, dtype=torch.float64).to(dtype)
                 for n in (5003, 17, 1, 9000)]
        ids = torch.arange(70) % 23
        for norm in ("l2", "l1"):
            for more in ({}, {"privacy_unit_ids": ids}, {"mechanism": "laplace"}):
                out, stats = clip_and_noise(grads, max_grad_norm=20.0, noise_multiplier=0.5,
                    norm=norm, noise=NoiseSource(1), return_stats=True, **more)
                got.append(digest(*out, stats.sensitive_norms))
    result[str(threads)] = got
print(json.dumps([_native.build_info()["instruction_set"], result]))
"""
FLAGS = {
    "baseline": (),
    "avx2": ("avx2", "fma"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
}


def cpu_lacks(name):
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return [flag for flag in FLAGS[name] if flag not in flags]


def run_with_isa(name, code):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tempfile.gettempdir(),  # the source folder would hide an installed package
        env={**os.environ, "DPFAST_FORCE_ISA": name},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def baseline_bits():
    run = run_with_isa("baseline", BITS)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", FLAGS)
def test_noise_and_sum_have_same_bits_for_any_threads_and_instruction_set(name, baseline_bits):
    if lacking := cpu_lacks(name):
        pytest.skip(f"this processor lacks {', '.join(lacking)}")
    if name == "baseline":
        used, bits = baseline_bits
    else:
        run = run_with_isa(name, BITS)
        assert run.returncode == 0, run.stderr
        used, bits = json.loads(run.stdout)
    assert used == name
    assert bits["1"] == bits["2"] == bits["3"]
    assert bits["1"] == baseline_bits[1]["1"]


def test_noise_unknown_instruction_set_fails_at_import():
    run = run_with_isa("avx9000", "import dpfast")
    assert run.returncode != 0
    assert "DPFAST_FORCE_ISA" in run.stderr
    assert "avx9000" in run.stderr
