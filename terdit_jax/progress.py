"""How far a command is: a bar on a terminal, lines elsewhere. What is counted belongs to the callers.

`streams` wipes the bar away where other text is written; it is drawn again with the next count.
"""

from collections.abc import Callable
import contextlib
import math
import os
import sys
import time

from terdit_jax.streams import SteadyStream

REPORT_SECONDS = 5.0
_UNTIMED = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{unit}{postfix}"


def format_duration(seconds: float) -> str:
    """45s, 12m30s, 3h05m or 2d07h."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


class Bar:
    """tqdm's bar where standard output is a terminal that tells its size, and nothing elsewhere: tqdm draws nothing on
    one of no columns or lines. Attribute `shown`: which of the two."""

    def __init__(self, total: int, unit: str, *, start: int = 0, name: str = "", timed: bool = True, show: bool = True):
        """Counts from `start` to `total`; drawn from the first count on. `timed`: with tqdm's own rate and time left;
        `show`: False for none."""
        self.shown, stream = False, getattr(sys.stdout, "_stream", sys.stdout)
        with contextlib.suppress(AttributeError, ValueError, OSError):  # no standard output, or a closed one
            self.shown = show and stream.isatty() and all(os.get_terminal_size(stream.fileno()))
        if self.shown:
            from tqdm import tqdm

            tqdm.monitor_interval = 0  # its thread would draw in the middle of other lines
            SteadyStream.bar = SteadyStream(stream, "standard error")
            self._bar = tqdm(
                total=total, initial=start, unit=f" {unit}", desc=name or None, file=SteadyStream.bar,
                dynamic_ncols=True, leave=False, delay=1e-9, bar_format=None if timed else _UNTIMED,
            )  # fmt: skip

    def reached(self, done: int) -> None:
        """Shows that `done` are done."""
        if self.shown:
            self._bar.update(done - self._bar.n)

    def tell(self, text: str) -> None:
        """Shows a text after the bar, from the next count on."""
        if self.shown:
            self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """Wipes the bar away."""
        if self.shown:
            self._bar.close()
            self.shown, SteadyStream.bar = False, None


class Progress:
    """A bar, or lines such as `2,048/50,000 images  31.2 a second  25m37s left`, of images that are done."""

    def __init__(
        self,
        total: int,
        say: Callable[[str], None],
        *,
        start: int = 0,
        name: str = "",
        seconds: float = REPORT_SECONDS,
        show: bool = True,
    ):
        """Takes how many there are, of which `start` are done, and what prints a line, which begins with `name` and
        comes every `seconds` seconds; `show`: whether there may be a bar."""
        self._total, self._say, self._name, self._seconds = total, say, name, seconds
        self._start = self.done = start
        self._begin = self._last = time.monotonic()
        self._bar = Bar(total, "images", start=start, name=name, show=show)

    def reached(self, done: int, *, now: bool = False) -> None:
        """Shows that `done` images are done; a line is due now and then, and `now`."""
        self.done = min(done, self._total)
        self._bar.reached(self.done)
        moment = time.monotonic()
        if not self._bar.shown and (now or moment - self._last >= self._seconds):
            self._last = moment
            rate = (self.done - self._start) / max(1e-9, moment - self._begin)
            left = format_duration((self._total - self.done) / rate) if rate else "?"
            self._say(f"{self._name}{self.done:,}/{self._total:,} images  {rate:,.1f} a second  {left} left")
        if self.done == self._total:
            self._bar.close()
