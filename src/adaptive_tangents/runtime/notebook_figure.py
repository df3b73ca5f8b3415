"""A figure that notebooks show as a picture, whether or not pyplot was imported."""

from io import BytesIO

from matplotlib import figure


class Figure(figure.Figure):
    """matplotlib's figure with a picture of its own for notebooks."""

    # IPython asks for this only where no printer of figures is registered, so a picture is never shown twice.
    def _repr_png_(self) -> bytes:
        """The figure as PNG, as matplotlib's inline backend draws it."""
        picture = BytesIO()
        self.savefig(picture, format="png", dpi=self.dpi, bbox_inches="tight")
        return picture.getvalue()
