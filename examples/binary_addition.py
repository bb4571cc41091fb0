"""Synthetic gradients from scratch: a network learns to add binary numbers while its layers do not wait for each other.

Nothing is needed but NumPy. Read from top to bottom: the task, backpropagation, the same with predicted gradients, the comparison.

    python examples/binary_addition.py

The method is from Jaderberg et al. 2016, "Decoupled neural interfaces using synthetic gradients", arXiv 1608.05343. To add two
binary numbers is how many have met it, in a tutorial of 2017; what goes wrong in the code handed down from there is said below.
"""

import argparse
import time

import numpy as np

BITS = 8
PAIRS = 1000  # as many to train on as are held out
BATCH = 10
# Chosen on seeds 100 to 105 among 0.1, 0.3, 1 and 0.0003, 0.001, 0.003; what the table shows is from other seeds.
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
# could tell by itself what word will come? A second, tiny network, the synthesiser, guesses the gradient from what the layer has
# at hand. The layer learns from the guess. When the word does come, it is the synthesiser that learns from it, to guess better.


class DecoupledLayer(Layer):
    """A layer with a synthesiser, a linear map from (output, hint, 1) to the gradient of the loss with respect to the output."""

    def __init__(self, inputs, outputs, rng, hint_size):
        super().__init__(inputs, outputs, rng)
        # It starts at zero: no guess is better than a random one. The layer waits until there is something to be said.
        self.synthesiser = np.zeros((outputs + hint_size + 1, outputs))

    def guess(self, hint):
        """Returns the synthetic gradient."""
        self.seen = np.hstack([self.output, hint, np.ones((len(hint), 1))])
        return self.seen @ self.synthesiser

    def learn_at_once(self, hint):
        """Updates the weights by the guess, and returns what the layer below will want to hear.

        The message is computed before the update: it belongs to the weights that the forward pass of this batch ran with.
        """
        self.synthetic = self.guess(hint)
        message = self.backward(self.synthetic)
        self.update(RATE)
        return message

    def learn_to_guess(self, reported, rate):
        """Moves the guess towards what the layer above reported: a step down on half the squared error of the guess."""
        self.synthesiser -= rate * self.seen.T @ (self.synthetic - reported)


def decoupled_step(layers, x, target, rate):
    """Learns from one batch; when a layer learns, those above have not even seen the batch.

    That they run one after another here is for want of a second computer. Between a layer and the next there are two messages,
    the output going up and the gradient going down, and nobody is kept waiting by the second.
    """
    *decoupled, last = layers
    messages = []
    for layer in decoupled:
        x = layer.forward(x)
        messages.append(layer.learn_at_once(hint_for(layer, target)))
    # The last layer sits right under the loss. It has the true gradient and needs no synthesiser.
    messages.append(last.backward(loss_gradient(last.forward(x), target)))
    last.update(RATE)
    # A message was made of a guess, too (but for the last layer's). So truth seeps down layer by layer, batch by batch.
    for layer, reported in zip(decoupled, messages[1:], strict=True):
        layer.learn_to_guess(reported, rate)


def hint_for(layer, target):
    """Returns as much of the true bits as the layer's synthesiser has inputs for: all of them or none."""
    return target[:, : len(layer.synthesiser) - layer.output.shape[1] - 1]


# What the hint is for. Without it a linear synthesiser hears almost nothing, and not by bad luck. The last layer learns until
# its error is no longer correlated with its input: its weight gradient, inputs.T @ before_sigmoid, has become zero. That same
# input is all that the synthesiser below sees, and a correlation with it is all that a linear map can find. So the best
# guess tends to zero, and the layers below stay about as random as they began: compare the table's lines two and three.
# A random layer's output barely tells the bits of a sum. Given the true bits, "which way?" is easy to answer.
#
# Why a rate of its own. Sigmoid outputs lie around 1/2, never around 0, so they all pull the synthesiser the same way. On one
# batch its step is stable only below 2 / (largest eigenvalue of seen.T @ seen). With ten samples and a hundred outputs near
# 1/2 the eigenvalue is some hundreds, so rates around 0.01 explode, while the layers themselves like a rate of 0.3.
#
# Three slips in the version that was copied most. (1) There the synthesiser's update is an addition of outputs.T @ (guess -
# truth). That product is the gradient of the squared error, so to add it makes each guess worse than the one before, and ever
# faster. (2) The weights' update is an addition, too, whereas the gradient at the top is defined as output minus target, which
# points to a higher loss. A sign too many could have cancelled one elsewhere, but not this one: a fitted synthesiser would
# imitate a gradient, and the layer would climb. (3) The message to the layer below goes through the weights after their update,
# so it is the gradient of a network that has never run. A small rate hides all three for a while: little moves at all.


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


def build(seed, hint_size=None):
    """Makes the three layers, from the same random weights for each method; with synthesisers if there is a hint size."""
    rng = np.random.default_rng([seed, 1])
    sizes = [(2 * BITS, 128), (128, 64)]
    hidden = [Layer(*size, rng) if hint_size is None else DecoupledLayer(*size, rng, hint_size) for size in sizes]
    return [*hidden, Layer(64, BITS, rng)]


def main(seed=0, epochs=200):
    """Trains four ways, prints a table, and returns the numbers in it: {method: {"bits", "sums", "seconds"}}."""

    def learn_guesses(layers, x, target):
        decoupled_step(layers, x, target, SYNTHESISER_RATE)

    def keep_guessing_zero(layers, x, target):
        decoupled_step(layers, x, target, 0)

    methods = {
        "backpropagation": (build(seed), backprop_step),
        "last layer only": (build(seed, 0), keep_guessing_zero),  # what the last layer makes of two random ones
        "synthetic, from output": (build(seed, 0), learn_guesses),
        "synthetic, from output and true bits": (build(seed, BITS), learn_guesses),
    }
    x, target, held_out_x, held_out_target = make_task(np.random.default_rng([seed, 0]))
    results = {}
    print(f"{'':36}  bits right  sums right  seconds")
    for name, (layers, step) in methods.items():
        seconds = train(layers, step, x, target, epochs, np.random.default_rng([seed, 2]))
        results[name] = found = measure(layers, held_out_x, held_out_target) | {"seconds": seconds}
        print(f"{name:36}  {found['bits']:10.3f}  {found['sums']:10.3f}  {seconds:7.1f}")
    return results


# The true bits are shown while training only: to add two numbers nobody has to guess a gradient.
#
# The same lesson in ten lines of lockfree, for any PyTorch model: binary_addition_lockfree.py, beside this file.

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Learn to add binary numbers, with and without waiting for the gradient.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=200)
    arguments = parser.parse_args()
    main(arguments.seed, arguments.epochs)
