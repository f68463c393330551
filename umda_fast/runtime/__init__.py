"""What every run needs: its configuration, its directory, progress, guards, agreement between processes.

Needs the extra `train`.
"""
