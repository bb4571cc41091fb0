"""The check that every network makes before it is built."""


def check_shape(name: str, input_shape: tuple[int, int, int], classes: int, *, smallest: int = 1) -> None:
    """Makes sure that a network can be built for these inputs and classes.

    Args:
        name: The network, for messages.
        input_shape: (channels, height, width).
        classes: How many classes it tells apart.
        smallest: The least height and width that its pooling leaves something of.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> check_shape("mlp", (1, 28, 28), 10)
    """
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ValueError(f"{name}: expected input_shape (channels, height, width), each 1 or more, got {input_shape}")
    if min(input_shape[1:]) < smallest:
        raise ValueError(
            f"{name}: expected inputs of {smallest}x{smallest} or larger, got {input_shape[1]}x{input_shape[2]}; "
            "its pooling would leave nothing: take mlp, or enlarge the inputs"
        )
    if classes < 1:
        raise ValueError(f"{name}: expected one class or more, got classes={classes}")
