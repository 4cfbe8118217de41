"""Why a benchmark could not be carried out."""


class BenchError(Exception):
    """The measurement did not come about; its text is one clear line."""
