"""What can go wrong in the engine, by whose fault it is."""


class EngineError(Exception):
    """Any failure that the engine names itself."""


class CheckpointError(EngineError):
    """A checkpoint can't be loaded: names the file, the tensor, the shape found and the shape expected."""


class RequestError(EngineError, ValueError):
    """A request asks for what the model can't do: names the field, what came and what is allowed."""

    def __init__(self, field: str, got: object, allowed: str) -> None:
        super().__init__(f"{field}: got {got!r}; allowed: {allowed}")
        self.field, self.got, self.allowed = field, got, allowed


class OutOfMemory(EngineError):
    """The device ran out of memory in the middle of a request.

    One rank alone is ready for the next one. Of several, the others are lost to it (RankLost): the group
    must be made anew, which keeps its weights where its processes live on.
    """


class RankLost(EngineError):
    """Another rank died or hangs: this group of ranks is of no more use and must be made anew."""


class VideoError(EngineError):
    """ffmpeg could not write or read a video; carries its own words."""
