"""Networks that are the exact solution for Gaussian data, to hold objectives and samplers against.

Data x ~ N(mu, sigma² I). On the linear path z_t ~ N(m_t, a_t² I) with m_t = (1 - t) mu and
a_t² = (1 - t)² sigma² + t², and the flow carries z_t to z_r = m_r + (a_r / a_t) (z_t - m_t).
"""

import torch
from torch.utils._pytree import tree_map

from training.objectives.paths import expand


def points(n=64):
    """z, t, r, y in float64, 0 < r < t < 1."""
    torch.manual_seed(0)
    z = torch.randn(n, 3, dtype=torch.float64)
    t = 0.3 + 0.6 * torch.rand(n, dtype=torch.float64)
    r = t * (0.1 + 0.8 * torch.rand(n, dtype=torch.float64))
    return z, t, r, torch.zeros(n, dtype=torch.int64)


def doubled(sample):
    return tree_map(
        lambda a: a.double() if torch.is_tensor(a) and a.is_floating_point() else a, sample
    )


def slope(loss, parameters, step=1e-5):
    """(Derivative of loss() by automatic differentiation, by central difference) along a direction
    of the parameters; the second never sees what the loss holds constant.
    """
    direction = [torch.randn_like(p) for p in parameters]
    grads = torch.autograd.grad(loss(), parameters, materialize_grads=True)
    exact = sum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True))

    def moved(length):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=length)
        value = float(loss().detach())
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(d, alpha=length)
        return value

    return exact, (moved(step) - moved(-step)) / (2 * step)


class GaussianMeanFlow(torch.nn.Module):
    """The average velocity u(z, t, r), at r = t the velocity; the second head is the velocity."""

    def __init__(self, mu=0.7, sigma=0.4):
        super().__init__()
        self.mu, self.sigma = mu, sigma

    def moments(self, t):
        return (1 - t) * self.mu, ((1 - t) ** 2 * self.sigma**2 + t**2).sqrt()

    def forward(self, z, t, r, y, *_):
        (m_t, a_t), (m_r, a_r) = self.moments(expand(t, z)), self.moments(expand(r, z))
        h = expand(torch.where(t == r, 1, t - r), z)
        average = ((z - m_t) * (1 - a_r / a_t) + m_t - m_r) / h
        return torch.where(expand(t == r, z), self.velocity(z, t), average)

    def velocity(self, z, t):
        t = expand(t, z)
        m_t, a_t = self.moments(t)
        return (t - (1 - t) * self.sigma**2) / a_t**2 * (z - m_t) - self.mu

    def heads(self, z, t, r, y, *_):
        return self(z, t, r, y), self.velocity(z, t)


class GaussianConsistency(torch.nn.Module):
    """F(x_t / σ, t) of the consistency function f(x_t, t) = mu + sigma (x_t - m_t) / a_t on the
    TrigFlow path, where m_t = cos t mu and a_t² = cos² t sigma² + sin² t σ².
    """

    def __init__(self, mu=0.7, sigma=0.4, sigma_data=0.5):
        super().__init__()
        self.mu, self.sigma, self.sigma_data = mu, sigma, sigma_data

    def spread(self, t):
        return (t.cos() ** 2 * self.sigma**2 + t.sin() ** 2 * self.sigma_data**2).sqrt()

    def forward(self, x, t, r, y):
        t = expand(t, x)
        x_t = self.sigma_data * x
        f = self.mu + self.sigma * (x_t - t.cos() * self.mu) / self.spread(t)
        return (t.cos() * x_t - f) / (t.sin() * self.sigma_data)

    def velocity(self, x_t, t):
        """dx/dt, the marginal velocity."""
        t = expand(t, x_t)
        rate = t.sin() * t.cos() * (self.sigma_data**2 - self.sigma**2) / self.spread(t) ** 2
        return rate * (x_t - t.cos() * self.mu) - t.sin() * self.mu

    def log_variance(self, t):
        return torch.zeros_like(t)
