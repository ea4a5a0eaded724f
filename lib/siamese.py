"""The head of SimSiam and of the paper's DDCL, in place of DINO's head."""

import torch
import torch.nn as nn


class SiameseHead(nn.Module):
    """SimSiam's projector and predictor (Chen and He 2021, section 3). DDCL: one for each part."""

    def __init__(self, in_dim, hidden=2048, bottleneck=512):
        super().__init__()
        layers = []
        for width in (in_dim, hidden, hidden):
            layers += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
        layers[-2:] = [nn.BatchNorm1d(hidden, affine=False)]
        self.projector = nn.Sequential(*layers)
        layers = [nn.Linear(hidden, bottleneck, bias=False), nn.BatchNorm1d(bottleneck), nn.ReLU()]
        self.predictor = nn.Sequential(*layers, nn.Linear(bottleneck, hidden))

    def embed(self, z):
        """Map z (2 B, in_dim), view by view, to projections and predictions (2, 2 B, hidden)."""
        projections = torch.cat([self.projector(view) for view in z.chunk(2)])  # batch norm by view
        predictions = torch.cat([self.predictor(view) for view in projections.chunk(2)])
        return torch.stack([projections, predictions])
