"""Synthetic gradients from scratch: a network learns to add binary numbers while its layers do not wait for each other.

Nothing but NumPy is needed. Read from top to bottom: the task, backpropagation, predicted gradients, the comparison.

    python examples/binary_addition.py

The method is from Jaderberg et al. 2016, "Decoupled neural interfaces using synthetic gradients", arXiv 1608.05343. To add two
binary numbers is how many have met it, in a tutorial of 2017; what goes wrong in the code handed down from there is said below.
"""

import argparse
import time
from functools import partial

import numpy as np

BITS = 8
PAIRS = 1000  # as many to train on as are held out
BATCH = 10
# The rates were chosen on seeds 100 to 105, among 0.1, 0.3, 1 and 0.0003, 0.001, 0.003.
RATE = 0.3
SYNTHESISER_RATE = 0.001


# ---- The task: in go the bits of two numbers, out come the bits of their sum -------------------------------------------------
# The numbers are below 128, so that the sum fits eight bits, too. A carry can run through all of them, which makes the task
# harder than it looks: each bit of the sum is an "exclusive or", and no weighted sum of the input bits comes near one.


def to_bits(numbers):
    """Writes each number as a row of zeros and ones, the lowest bit first."""
    return (numbers[:, None] >> np.arange(BITS) & 1).astype(float)


def make_task(rng):
    """Returns inputs and targets to train on, then inputs and targets that are held out; no pair of numbers occurs twice."""
    below = 2 ** (BITS - 1)
    left, right = np.divmod(rng.choice(below * below, 2 * PAIRS, replace=False), below)
    x, target = np.hstack([to_bits(left), to_bits(right)]), to_bits(left + right)
    return x[:PAIRS], target[:PAIRS], x[PAIRS:], target[PAIRS:]


# ---- Backpropagation: up through all layers, down through all layers, and only then does anybody learn -----------------------


def sigmoid(z):
    """Squeezes every number into 0 to 1; written with tanh, because exp(-z) overflows where z is very negative."""
    return 0.5 + 0.5 * np.tanh(0.5 * z)


class Layer:
    """One layer: sigmoid(inputs @ weights + biases). A batch is a matrix with a row for each sample."""

    def __init__(self, inputs, outputs, rng):
        bound = 4 * np.sqrt(6 / (inputs + outputs))  # wide enough for signals and gradients to get through several sigmoids
        self.weights, self.biases = rng.uniform(-bound, bound, (inputs, outputs)), np.zeros(outputs)

    def forward(self, inputs):
        """Computes the output, and remembers what the way back needs."""
        self.inputs, self.output = inputs, sigmoid(inputs @ self.weights + self.biases)
        return self.output

    def backward(self, gradient):
        """Takes the gradient of the loss with respect to the output; returns the one with respect to the input."""
        before_sigmoid = gradient * self.output * (1 - self.output)  # a sigmoid has the slope output * (1 - output)
        self.weight_gradient, self.bias_gradient = self.inputs.T @ before_sigmoid, before_sigmoid.sum(axis=0)
        return before_sigmoid @ self.weights.T

    def update(self, rate):
        """Goes a small step downhill: gradients point uphill, hence the minus."""
        self.weights -= rate * self.weight_gradient
        self.biases -= rate * self.bias_gradient


def loss_gradient(output, target):
    """Returns the gradient of the loss, half the squared error summed over bits and batch, with respect to the output."""
    return output - target


def run_forward(layers, x):
    """Runs all layers, bottom to top, and returns the output of the last."""
    for layer in layers:
        x = layer.forward(x)
    return x


def backprop_step(layers, x, target):
    """Learns from one batch, the usual way."""
    gradient = loss_gradient(run_forward(layers, x), target)
    for layer in reversed(layers):
        gradient = layer.backward(gradient)
    for layer in layers:
        layer.update(RATE)


# ---- Synthetic gradients: every layer guesses its gradient and learns at once ------------------------------------------------
# The first layer was done with the batch long ago, but had to keep it in memory until word came down from the top. What if it
# could tell by itself what word will come? A second, tiny network, the synthesiser, guesses the gradient from what is at hand.
# The layer learns from the guess at once. When the word does come, the synthesiser learns from it, to guess better next time.


class DecoupledLayer(Layer):
    """A layer with a synthesiser: a linear map from (output, hint, 1) to a guess of the loss's gradient at the output."""

    def __init__(self, inputs, outputs, rng, hint_bits):
        super().__init__(inputs, outputs, rng)
        self.hint_bits = hint_bits  # the hint is the true bits of the sum, or nothing: 0
        # It starts at zero: better no guess than a random one. The layer keeps still until there is something to go by.
        self.synthesiser = np.zeros((outputs + hint_bits + 1, outputs))

    def guess(self, target):
        """Returns the synthetic gradient."""
        self.seen = np.hstack([self.output, target[:, : self.hint_bits], np.ones((len(target), 1))])
        return self.seen @ self.synthesiser

    def learn_at_once(self, target):
        """Updates the weights by the guess, and returns the message to the layer below: its gradient, as far as known here.

        The message is computed before the update, for it belongs to the weights that this batch was run forward with.
        """
        self.synthetic = self.guess(target)
        message = self.backward(self.synthetic)
        self.update(RATE)
        return message

    def learn_to_guess(self, reported, rate):
        """Moves the guess towards what the layer above reports: a step downhill on half the squared error of the guess."""
        self.synthesiser -= rate * self.seen.T @ (self.synthetic - reported)


def decoupled_step(layers, x, target, rate=SYNTHESISER_RATE):
    """Learns from one batch; when a layer learns, those above it have not even seen the batch."""
    *decoupled, last = layers
    messages = []
    for layer in decoupled:
        x = layer.forward(x)
        messages.append(layer.learn_at_once(target))
    # The last layer sits right under the loss. It has the true gradient and needs no synthesiser.
    messages.append(last.backward(loss_gradient(last.forward(x), target)))
    last.update(RATE)
    # All messages but the last layer's are made of guesses, too. So truth seeps down, layer by layer and batch by batch.
    for layer, reported in zip(decoupled, messages[1:], strict=True):
        layer.learn_to_guess(reported, rate)


# What the hint is for. Without it there is next to nothing to be learnt, and that is not bad luck. The last layer learns until
# its error has no correlation with its input left: then its weight gradient, inputs.T @ before_sigmoid, is zero. But that input
# is all that the synthesiser below sees, and correlations are all that a linear map can find, so its best guess tends to zero.
# The layers below stay about as random as they began, and the output of random layers hardly tells the bits of the sum. There
# it ends: lines two and three of the table are alike. Whoever also knows the true bits can tell the error.
#
# Why a rate of its own. The outputs of a sigmoid lie around 1/2 and not around 0, so all of them pull the synthesiser the same
# way. A step on one batch is stable only at rates below 2 / (the largest eigenvalue of seen.T @ seen). Here that is about
# 2 / 340 for the first layer: at 0.01 the guesses explode, whereas the layers themselves like a rate of 0.3.
#
# Three things are wrong in the version that has been copied most. (1) It adds outputs.T @ (guess - truth) to the synthesiser.
# That is the gradient of the squared error: adding it makes each guess worse than the last. Here they pass 1e12 in one epoch.
# (2) It adds the synthetic gradient to the weights, too, though the true one is made of output minus target and points uphill:
# the better the guess, the surer the layer climbs. The two signs do not cancel; together they explode as well. (3) Its message
# to the layer below goes through the weights after their update, so it is the gradient of a network that has never run.


# ---- The comparison ----------------------------------------------------------------------------------------------------------


def measure(layers, x, target):
    """Returns the share of bits, and of whole sums, that come out right."""
    right = (run_forward(layers, x) > 0.5) == (target > 0.5)
    return {"bits": float(right.mean()), "sums": float(right.all(axis=1).mean())}


def train(layers, step, x, target, epochs, rng):
    """Goes through the training pairs so many times, each time in a new order, ten at a time; returns the seconds it took."""
    start = time.perf_counter()
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for first in range(0, len(x), BATCH):
            batch = order[first : first + BATCH]
            step(layers, x[batch], target[batch])
    return time.perf_counter() - start


def build(seed, hint_bits=None):
    """Makes three layers, with the same random weights for each method; with synthesisers, unless ``hint_bits`` is left out."""
    rng = np.random.default_rng([seed, 1])
    sizes = [(2 * BITS, 128), (128, 64)]
    hidden = [Layer(*size, rng) if hint_bits is None else DecoupledLayer(*size, rng, hint_bits) for size in sizes]
    return [*hidden, Layer(64, BITS, rng)]


def main(seed=0, epochs=200):
    """Trains four ways, prints a table of what comes out on held-out pairs, and returns it as {method: {column: number}}."""
    methods = {
        "backpropagation": (build(seed), backprop_step),
        "last layer only": (build(seed, 0), partial(decoupled_step, rate=0)),  # guesses stay zero, so hidden layers stay random
        "synthetic, from output": (build(seed, 0), decoupled_step),
        "synthetic, from output and true bits": (build(seed, BITS), decoupled_step),
    }
    x, target, held_out_x, held_out_target = make_task(np.random.default_rng([seed, 0]))
    results = {}
    print(f"{'':36}  bits right  sums right  seconds")
    for name, (layers, step) in methods.items():
        seconds = train(layers, step, x, target, epochs, np.random.default_rng([seed, 2]))
        results[name] = found = measure(layers, held_out_x, held_out_target) | {"seconds": seconds}
        print(f"{name:36}  {found['bits']:10.3f}  {found['sums']:10.3f}  {seconds:7.1f}")
    return results


# The true bits are a hint in training only: a network that adds needs no gradient. That the last line may beat the first means
# little: both know all training pairs by heart, and with another loss and another optimizer backpropagation is ahead. See
# the same lesson in ten lines of lockfree, for any PyTorch model: binary_addition_lockfree.py, beside this file.

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Learn to add binary numbers, with and without waiting for the gradient.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=200)
    arguments = parser.parse_args()
    main(arguments.seed, arguments.epochs)
