"""Agreement of a repeated accuracy with the committed one."""


def agrees(name: str, accuracy: float, committed: float, tested: int) -> bool:
    """Print both accuracies and return whether they are within one standard error.

    The standard error is that of an accuracy on `tested` examples. On the machine of the table
    results are identical; on other machines matrix products round differently.
    """
    error = (committed * (1 - committed) / tested) ** 0.5
    close = abs(accuracy - committed) <= error
    print(
        f"{name}: {100 * accuracy:.1f} %, committed {100 * committed:.1f} ± {100 * error:.1f} %, "
        f"{'agrees' if close else 'DIFFERS'}",
        flush=True,
    )
    return close
