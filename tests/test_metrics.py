import pytest
import torch

from vgen.metrics import psnr, ssim


def test_psnr_by_hand():
    x = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    y = x.clone()
    y[1] = 51  # error 0.2 of the range: -20 log10(0.2) dB
    assert psnr(x, y).tolist() == pytest.approx([100.0, 13.9794], abs=1e-3)


def test_ssim_against_a_direct_window():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (1, 3, 12, 13), generator=generator, dtype=torch.uint8)
    y = (x.float() * 0.8 + 20).to(torch.uint8)
    line = torch.exp(-((torch.arange(11) - 5.0) ** 2) / 4.5)
    window = torch.outer(line, line) / line.sum() ** 2
    values = []
    for c in range(3):
        for top in range(2):
            for left in range(3):
                a, b = (p[0, c, top : top + 11, left : left + 11].double() for p in (x, y))
                ma, mb = (window * a).sum(), (window * b).sum()
                va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
                cov = (window * (a - ma) * (b - mb)).sum()
                c1, c2 = 2.55**2, 7.65**2
                values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    assert ssim(x, y).item() == pytest.approx(torch.stack(values).mean().item(), abs=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert ssim(x, x).item() == pytest.approx(1.0, abs=1e-5)
