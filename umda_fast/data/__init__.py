"""Bags and where they come from: datasets, batches, samplers, file formats, splits."""

from umda_fast.data.bag import Bag
from umda_fast.data.batch import BagBatch, collate
from umda_fast.data.dataset import BagDataset, concat
from umda_fast.data.files.pack import PackResult, pack_slides
from umda_fast.data.metadata import Metadata
from umda_fast.data.sampler import BagLoader, InstanceBudgetSampler, make_loader
from umda_fast.data.sources.inspection import SourceReport, inspect_source, inspect_splits
from umda_fast.data.sources.source import FORMATS, SourceFormat, find_format, load_folds, load_source
from umda_fast.data.splits import SPLITS, Fold, Splits, k_fold, split_bags
from umda_fast.data.stores import BagStore

__all__ = [
    "FORMATS",
    "SPLITS",
    "Bag",
    "BagBatch",
    "BagDataset",
    "BagLoader",
    "BagStore",
    "Fold",
    "InstanceBudgetSampler",
    "Metadata",
    "PackResult",
    "SourceFormat",
    "SourceReport",
    "Splits",
    "collate",
    "concat",
    "find_format",
    "inspect_source",
    "inspect_splits",
    "k_fold",
    "load_folds",
    "load_source",
    "make_loader",
    "pack_slides",
    "split_bags",
]
