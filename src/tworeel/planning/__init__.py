"""What fits which cards, and how fast: known before a weight is read."""

from tworeel.planning.explaining import plan
from tworeel.planning.planner import Planner
from tworeel.planning.plans import Alternative, Plan, StagePlan
from tworeel.planning.requests import Request

__all__ = ["Alternative", "Plan", "Planner", "Request", "StagePlan", "plan"]
