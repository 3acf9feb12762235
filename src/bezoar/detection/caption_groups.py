"""Groups of like captions, by k-means of their vectors."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.detection import pseudo_classes
from bezoar.evaluation import kmeans

CAPTION_SAMPLE = 1 << 15  # captions that the groups are found on


@dataclass(frozen=True)
class CaptionGroups:
    """Groups of like captions."""

    of_record: Tensor  # int64 (N,)
    centres: Tensor  # unit (G, D), of the captions' vectors less their mean

    def __len__(self) -> int:
        return len(self.centres)


def group_captions(
    texts: Tensor, order: np.ndarray, count: int, seed: int, device: torch.device
) -> CaptionGroups:
    """Group captions by k-means on a sample, the first records of an order.

    Args:
        texts: (N, D), the captions' vectors.
        order: int64 (N,), rows in an order that belongs to the records.
        count: groups; 0: none, and every record is of group 0.
        device: where to compute.
    """
    if not count:
        no_centres = torch.empty(0, texts.shape[1], device=device)
        return CaptionGroups(torch.zeros(len(texts), dtype=torch.long), no_centres)
    rows = torch.as_tensor(order[:CAPTION_SAMPLE], device=texts.device)
    sample = texts[rows].to(device).float()
    mean = sample.mean(0)
    sample = F.normalize(sample - mean, dim=1, eps=1e-6)
    centres = kmeans.cluster_centres(sample, count, seed)
    centres = F.normalize(centres, dim=1, eps=1e-6)
    of_record = [
        ((part - mean) @ centres.T).argmax(1).cpu()
        for part in pseudo_classes.vector_blocks(texts, device)
    ]
    return CaptionGroups(torch.cat(of_record), centres)
