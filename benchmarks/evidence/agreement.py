"""Whether an accuracy that was measured again agrees with the committed one."""


def agrees(name: str, found: float, committed: float, tested: int) -> bool:
    """Print both and return whether they are within one standard error.

    It is the error of an accuracy on `tested` examples. On the machine of the table results are the
    same to the digit; elsewhere matrix products round differently.
    """
    error = (committed * (1 - committed) / tested) ** 0.5
    close = abs(found - committed) <= error
    print(
        f"{name}: {100 * found:.1f} %, committed {100 * committed:.1f} ± {100 * error:.1f} %, "
        f"{'agrees' if close else 'DIFFERS'}",
        flush=True,
    )
    return close
