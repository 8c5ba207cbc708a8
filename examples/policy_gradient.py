"""Policy gradient (REINFORCE): a network learns to balance gymnasium's CartPole from its own episodes."""

import argparse

import gymnasium
import torch
from torch import nn
from torch.distributions import Categorical

import pytrain


class Episodes:
    """Batches for the trainer: whole episodes, each played by the policy as it stands at that moment."""

    def __init__(self, policy, batches, episodes=8):
        self.policy, self.batches, self.episodes = policy, batches, episodes
        self.game = gymnasium.make("CartPole-v1", max_episode_steps=200)
        self.game.reset(seed=0)

    def __len__(self):
        return self.batches

    def __iter__(self):
        for _ in range(self.batches):
            played = [self.play() for _ in range(self.episodes)]
            yield tuple(torch.cat(part) for part in zip(*played, strict=True))

    @torch.no_grad()
    def play(self):
        states, actions, done = [], [], False
        state, _ = self.game.reset()
        while not done:
            states.append(torch.as_tensor(state))
            actions.append(Categorical(logits=self.policy(states[-1])).sample())
            state, _, fell, late, _ = self.game.step(actions[-1].item())
            done = fell or late
        remaining = torch.arange(len(states), 0, -1)  # every step's reward is 1
        returns = (1 - 0.99**remaining) / (1 - 0.99)
        return torch.stack(states), torch.stack(actions), returns, torch.tensor([float(len(states))])


class Policy(pytrain.Module):
    def __init__(self, width=64):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))

    def forward(self, states):
        return self.net(states)

    def training_step(self, batch, batch_idx):
        states, actions, returns, lengths = batch
        advantages = (returns - returns.mean()) / (returns.std() + 1e-6)
        self.log("return", lengths.mean(), prog_bar=True)
        return -(Categorical(logits=self(states)).log_prob(actions) * advantages).mean()

    def configure_optimizers(self):
        return pytrain.optim.Adam(self.parameters(), lr=1e-2)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-steps", type=int, default=40)
    steps = parser.parse_args(argv).max_steps
    pytrain.seed_everything(0)
    policy = Policy()
    episodes = Episodes(policy, batches=20)
    trainer = pytrain.Trainer(max_steps=steps, log_every_n_steps=5, default_root_dir="runs/policy_gradient")
    before = sum(len(episodes.play()[0]) for _ in range(20)) / 20
    trainer.fit(policy, episodes)
    after = sum(len(episodes.play()[0]) for _ in range(20)) / 20
    print(f"steps that the pole stays up, of 200: {before:.0f} untrained, {after:.0f} after {steps} steps")
    return before, after


if __name__ == "__main__":
    main()
