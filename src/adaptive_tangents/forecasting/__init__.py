"""What training will do to a network's features, foretold from its state before training.

``forecast`` takes steps θ_{k+1} = θ_k + sβ_k, each β_k an exact fit of the features at θ_k to what is left of the target. It
imports from capture, features, measures, penalties, solvers, structures and reporting.
"""

from adaptive_tangents.forecasting.cost import ForecastPlan
from adaptive_tangents.forecasting.forecast import forecast
from adaptive_tangents.forecasting.results import BlockForecast, Candidate, Forecast, ForecastKernels, load_forecast
from adaptive_tangents.forecasting.trust_region import Step

__all__ = [
    "BlockForecast",
    "Candidate",
    "Forecast",
    "ForecastKernels",
    "ForecastPlan",
    "Step",
    "forecast",
    "load_forecast",
]
