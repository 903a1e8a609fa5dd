"""Answers how numbers are written for people: shares, counts, durations, sizes; unknown is an en dash.

Does not round anything that is stored: CSV and JSON keep every digit.
"""

from __future__ import annotations

NO_VALUE = "\N{EN DASH}"


def short_count(value: float) -> str:
    """Write a large count the way people say it, three digits at most.

    Example:
        >>> [short_count(value) for value in (0, 950, 11_689_512, 1_800_000_000)]
        ['0', '950', '11.7M', '1.8G']
    """
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def percent(value: float | None) -> str:
    """Write a fraction as a percentage without its sign.

    Example:
        >>> percent(0.5234), percent(None)
        ('52.3', '–')
    """
    return NO_VALUE if value is None else f"{100 * value:.1f}"


def percent_with_spread(mean: float | None, std: float | None) -> str:
    """Write a mean fraction and its standard deviation, where there is one, as percentages.

    Example:
        >>> percent_with_spread(0.5234, 0.0041), percent_with_spread(0.5234, None)
        ('52.3 ± 0.4', '52.3')
    """
    return (
        percent(mean)
        if mean is None or std is None
        else f"{100 * mean:.1f} \N{PLUS-MINUS SIGN} {100 * std:.1f}"
    )


def points(mean: float, std: float | None) -> str:
    """Write a difference of two fractions in percentage points with its sign, and its standard deviation.

    Example:
        >>> points(0.0123, 0.0041), points(-0.02, None)
        ('+1.2 ± 0.4', '-2.0')
    """
    spread = "" if std is None else f" \N{PLUS-MINUS SIGN} {100 * std:.1f}"
    return f"{100 * mean:+.1f}{spread}"


def milliseconds(value: float | None) -> str:
    """Write a latency with three digits.

    Example:
        >>> milliseconds(0.04213), milliseconds(12.34), milliseconds(2345.6)
        ('0.0421', '12.3', '2,346')
    """
    if value is None:
        return NO_VALUE
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def count(value: float | None) -> str:
    """Write a count in full below 100,000 and shortened above.

    Example:
        >>> count(12345), count(11_689_512), count(None)
        ('12,345', '11.7M', '–')
    """
    if value is None:
        return NO_VALUE
    return f"{value:,.0f}" if abs(value) < 100_000 else short_count(value)


def number(value: float | None, digits: int) -> str:
    """Write a number with a fixed count of decimals.

    Example:
        >>> number(1.0, 3)
        '1.000'
    """
    return NO_VALUE if value is None else f"{value:,.{digits}f}"


def seconds(value: float | None) -> str:
    """Write a duration the way a clock would say it.

    Example:
        >>> seconds(8.25), seconds(754), seconds(7322)
        ('8.2 s', '12 min 34 s', '2 h 02 min')
    """
    if value is None:
        return NO_VALUE
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def times(value: float | None) -> str:
    """Write a ratio as so many times.

    Example:
        >>> times(2.314) == "2.31\N{MULTIPLICATION SIGN}"
        True
    """
    return NO_VALUE if value is None else f"{value:.2f}\N{MULTIPLICATION SIGN}"


def byte_size(value: float | None) -> str:
    """Write a number of bytes in binary units.

    Example:
        >>> byte_size(0), byte_size(7 << 20)
        ('0 B', '7.0 MiB')
    """
    if value is None:
        return NO_VALUE
    for size, suffix in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.1f} {suffix}"
    return f"{value:.0f} B"


def setting(value: object) -> str:
    """Write a setting's value for people.

    Example:
        >>> setting(0.123456), setting("full"), setting(None)
        ('0.1235', 'full', '–')
    """
    if value is None:
        return NO_VALUE
    return f"{value:.4g}" if isinstance(value, float) else str(value)
