"""The routed experts of one layer as an operator for other programs: `kt_sft.KTMoEWrapper`; docs/operator.md."""
