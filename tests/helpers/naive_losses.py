"""Every loss once more: float64, element by element, as its paper writes it; slow, and hard to get wrong."""

from __future__ import annotations

import torch


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.square().sum().sqrt()


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum()


def cross_entropy(logits: list[torch.Tensor], target: int) -> torch.Tensor:
    return torch.stack([logit.exp() for logit in logits]).sum().log() - logits[target]


def nt_xent(z1, z2, temperature, weights):
    """SimCLR, equation 1, anchor by anchor."""
    z, n = [unit(row) for row in (*z1, *z2)], len(z1)
    total = z1.new_zeros(())
    for i in range(2 * n):
        others = [k for k in range(2 * n) if k != i]
        logits = [dot(z[i], z[k]) / temperature for k in others]
        total = total + weights[i % n] * cross_entropy(logits, others.index((i + n) % (2 * n)))
    return total / (2 * n)


def multi_positive_nt_xent(z, temperature, view_weights, weights):
    """StableRep, equations 2 and 3, with a target distribution that follows the views' weights."""
    v, n = z.shape[:2]
    rows = [(view, source, unit(z[view, source])) for view in range(v) for source in range(n)]
    total = z.new_zeros(())
    for a, (view, source, anchor) in enumerate(rows):
        others = [row for b, row in enumerate(rows) if b != a]
        logits = [dot(anchor, row[2]) / temperature for row in others]
        positives = [place for place, row in enumerate(others) if row[1] == source]
        whole = sum(view_weights[others[place][0]] for place in positives)
        for place in positives:
            share = view_weights[others[place][0]] / whole
            total = total + view_weights[view] * weights[source] * share * cross_entropy(logits, place)
    return total / (n * sum(view_weights))


def negative_cosine(p, z, weights):
    """SimSiam, equation 1."""
    return sum(-w * dot(unit(a), unit(b)) for w, a, b in zip(weights, p, z, strict=True)) / len(p)


def byol(q, z, weights):
    """BYOL, equation 2: the squared distance of the unit vectors."""
    return sum(w * (unit(a) - unit(b)).square().sum() for w, a, b in zip(weights, q, z, strict=True)) / len(q)


def barlow_twins(z1, z2, off_diagonal_weight, weights):
    """Barlow Twins, equations 1 and 2; a weight counts how often a row occurs."""
    n, d = z1.shape

    def column(z, j):
        mean = sum(weights[b] * z[b, j] for b in range(n)) / n
        variance = sum(weights[b] * (z[b, j] - mean) ** 2 for b in range(n)) / n
        return [(z[b, j] - mean) / (variance + 1e-5) ** 0.5 for b in range(n)]

    first, second = [column(z1, j) for j in range(d)], [column(z2, j) for j in range(d)]
    total = z1.new_zeros(())
    for i in range(d):
        for j in range(d):
            correlation = sum(weights[b] * first[i][b] * second[j][b] for b in range(n)) / n
            total = total + ((1 - correlation) ** 2 if i == j else off_diagonal_weight * correlation**2)
    return total


def info_nce(q, k, queue, temperature, weights):
    """MoCo, equation 1."""
    total = q.new_zeros(())
    for weight, query, key in zip(weights, q, k, strict=True):
        logits = [dot(unit(query), unit(key)) / temperature]
        logits += [dot(unit(query), negative) / temperature for negative in queue]
        total = total + weight * cross_entropy(logits, 0)
    return total / len(q)


def vicreg(z1, z2, invariance_weight, variance_weight, covariance_weight, weights):
    """VICReg, algorithm 1 of the paper's appendix."""
    n, d = z1.shape
    total = z1.new_zeros(())
    for b in range(n):
        for j in range(d):
            total = total + invariance_weight * weights[b] * (z1[b, j] - z2[b, j]) ** 2 / (n * d)
    for z in (z1, z2):
        means = [sum(z[:, j]) / n for j in range(d)]
        for i in range(d):
            for j in range(d):
                covariance = sum((z[b, i] - means[i]) * (z[b, j] - means[j]) for b in range(n)) / (n - 1)
                if i == j:
                    hinge = torch.clamp(1 - (covariance + 1e-4).sqrt(), min=0)
                    total = total + variance_weight * hinge / (2 * d)
                else:
                    total = total + covariance_weight * covariance**2 / d
    return total


def nnclr(neighbours, p, temperature, weights):
    """NNCLR, equation 4."""
    total = p.new_zeros(())
    for i, neighbour in enumerate(neighbours):
        logits = [dot(unit(neighbour), unit(row)) / temperature for row in p]
        total = total + weights[i] * cross_entropy(logits, i)
    return total / len(p)


def dino(teacher, student, centre, teacher_temperature, student_temperature, weights):
    """DINO, equation 2, with the teacher centred and sharpened."""
    total = student.new_zeros(())
    for weight, t_row, s_row in zip(weights, teacher, student, strict=True):
        t = ((t_row - centre) / teacher_temperature).exp()
        s = (s_row / student_temperature).exp()
        for k in range(len(centre)):
            total = total - weight * t[k] / t.sum() * (s[k] / s.sum()).log()
    return total / len(teacher)
