"""Where the gradients of single tasks are taken: one file a scope. A new one is a file and a line here."""

from typing import Literal

from umda_fast.sgl.scopes.base import Direction, GradientScope, Measured, Representation, Setting, Unmeasured
from umda_fast.sgl.scopes.last_shared_layer import LastSharedLayerScope
from umda_fast.sgl.scopes.representation import RepresentationScope
from umda_fast.sgl.scopes.shared_parameters import SharedParametersScope

Scope = Literal["shared_parameters", "last_shared_layer", "representation"]

SCOPES: dict[str, type[GradientScope]] = {
    "shared_parameters": SharedParametersScope,
    "last_shared_layer": LastSharedLayerScope,
    "representation": RepresentationScope,
}

__all__ = [
    "SCOPES",
    "Direction",
    "GradientScope",
    "Measured",
    "Representation",
    "Scope",
    "Setting",
    "Unmeasured",
]
