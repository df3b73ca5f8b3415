"""Trackers as callbacks of trainers; the trainer's library is imported when a callback is made."""
