"""Trackers as callbacks of trainers: Hugging Face's and Lightning's.

The trainer's library is imported when a callback is made, not before. It imports from tracking, loading and capture.
"""

from adaptive_tangents.integrations.hugging_face import HuggingFaceTracker
from adaptive_tangents.integrations.lightning import LightningTracker

__all__ = ["HuggingFaceTracker", "LightningTracker"]
