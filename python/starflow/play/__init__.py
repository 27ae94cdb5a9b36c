"""What is it like in there? A page on which a model is played, steered and questioned."""

from starflow.play.game import Game, Moment, Score
from starflow.play.server import Played, PlayServer, serve

__all__ = ["Game", "Moment", "PlayServer", "Played", "Score", "serve"]
