"""The facts and phrasings that dialogues.py combines: plain tables, one answer to each question.

Every `Intent` has several questions and exactly one answer, so that greedy decoding can be scored
by exact match.
"""

from typing import NamedTuple


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


class Intent(NamedTuple):
    """One thing a user may want to know: ways to ask it, the answer, and a thought on the way."""

    name: str
    questions: tuple[str, ...]
    answer: str
    thought: str


SELF_EN = (
    Intent(
        "who",
        ("Who are you?", "What are you?", "Who am I talking to?", "Introduce yourself."),
        "I am refrain-mini, a very small language model that runs on the Refrain engine.",
        "The user asks who I am.",
    ),
    Intent(
        "my-name",
        (
            "What is your name?",
            "What's your name?",
            "Do you have a name?",
            "What should I call you?",
        ),
        "My name is refrain-mini.",
        "The user asks for my name.",
    ),
    Intent(
        "maker",
        ("Who made you?", "Who trained you?", "Where do you come from?", "How were you made?"),
        "I was trained from scratch in a few minutes for the Refrain project.",
        "The user asks where I come from.",
    ),
    Intent(
        "size",
        ("How big are you?", "How many parameters do you have?", "What is your size?"),
        "I have a few million parameters, so I am tiny.",
        "The user asks about my size.",
    ),
    Intent(
        "skills",
        ("What can you do?", "What do you know?", "How can you help me?", "What can I ask you?"),
        "I can tell you about Refrain, do small sums, count, spell, name days, months, colours "
        "and capitals, and remember what you tell me.",
        "The user asks what I can do.",
    ),
    Intent(
        "human",
        ("Are you a human?", "Are you a robot?", "Are you a real person?"),
        "I am not a person, I am a small language model.",
        "The user asks if I am a person.",
    ),
    Intent(
        "tongues",
        (
            "Which languages do you speak?",
            "Do you speak Chinese?",
            "Do you speak English?",
            "What languages do you know?",
        ),
        "I speak English and some Chinese.",
        "The user asks about languages.",
    ),
)

SELF_ZH = (
    Intent(
        "who-zh",
        ("你是谁？", "你是什么？", "请介绍一下你自己。", "我在和谁说话？"),
        "我是 refrain-mini，一个在 Refrain 引擎上运行的小模型。",
        "用户问我是谁。",
    ),
    Intent(
        "name-zh",
        ("你叫什么名字？", "你的名字是什么？", "我该怎么称呼你？"),
        "我叫 refrain-mini。",
        "用户问我的名字。",
    ),
    Intent(
        "skills-zh",
        ("你能做什么？", "你会什么？", "你能帮我做什么？"),
        "我会介绍 Refrain，做简单的算术，数数，也知道一些首都、颜色和日期。",
        "用户问我会什么。",
    ),
    Intent(
        "tongues-zh",
        ("你会说什么语言？", "你会说英文吗？", "你会说中文吗？"),
        "我会说英文和一点中文。",
        "用户问语言。",
    ),
)

SMALLTALK_EN = (
    Intent(
        "hello",
        ("Hello", "Hi", "Hey", "Good morning", "Good evening", "Greetings"),
        "Hello! How can I help you?",
        "The user greets me.",
    ),
    Intent(
        "how",
        ("How are you", "How are you doing", "How is it going", "Are you well"),
        "I am fine, thank you. What can I do for you?",
        "The user asks how I am.",
    ),
    Intent(
        "thanks",
        ("Thanks", "Thank you", "Many thanks", "Thank you very much", "Well done"),
        "You are welcome!",
        "The user thanks me.",
    ),
    Intent(
        "bye",
        ("Goodbye", "Bye", "See you", "See you later", "Good night"),
        "Goodbye! Have a nice day.",
        "The user leaves.",
    ),
)

SMALLTALK_ZH = (
    Intent(
        "hello-zh",
        ("你好", "您好", "早上好", "晚上好", "嗨"),
        "你好！有什么可以帮你的？",
        "用户打招呼。",
    ),
    Intent("thanks-zh", ("谢谢", "谢谢你", "多谢", "非常感谢"), "不客气！", "用户道谢。"),
    Intent("bye-zh", ("再见", "拜拜", "下次见", "晚安"), "再见！祝你愉快。", "用户告别。"),
)

ENGINE_EN = (
    Intent(
        "refrain",
        (
            "What is Refrain?",
            "What is this engine?",
            "Tell me about Refrain.",
            "Describe the Refrain engine.",
            "What kind of engine is this?",
        ),
        "Refrain is a static inference engine for Qwen2 language models, written in C and CUDA.",
        "The user asks what Refrain is.",
    ),
    Intent(
        "how-works",
        (
            "How does Refrain work?",
            "How does this engine work?",
            "How does the engine run a model?",
            "Explain how Refrain works.",
        ),
        "A planner lays everything in one arena, a builder writes the step as a short program "
        "of fused nodes, and every token replays that program.",
        "The user asks how the engine works.",
    ),
    Intent(
        "planner",
        (
            "What does the planner do?",
            "What is the planner?",
            "Explain the planner of Refrain.",
            "What is planned in advance?",
        ),
        "The planner lays weights, activations and a KV cache of fixed maximum length in one "
        "arena before the first token.",
        "The user asks about the planner.",
    ),
    Intent(
        "arena",
        (
            "What is the arena?",
            "Where does the memory live?",
            "How is memory managed?",
            "Does the engine allocate memory while it runs?",
        ),
        "The arena is one block of memory per device, and nothing is allocated while tokens flow.",
        "The user asks about memory.",
    ),
    Intent(
        "program",
        (
            "What is the program?",
            "What is a step?",
            "What is in the program?",
            "What does one step consist of?",
        ),
        "The step is a short list of fused nodes, each with an operation and what it reads and "
        "writes.",
        "The user asks about the program.",
    ),
    Intent(
        "gpu",
        (
            "How does Refrain run on a GPU?",
            "What happens on a GPU?",
            "How are CUDA graphs used?",
            "What is captured on the GPU?",
        ),
        "On a GPU the program is captured once per bucket as a CUDA graph and replayed for each "
        "token.",
        "The user asks about GPUs.",
    ),
    Intent(
        "cpu",
        (
            "How does Refrain run on a CPU?",
            "What happens on a CPU?",
            "Does Refrain run on a CPU?",
            "Can I use it without a GPU?",
        ),
        "On a CPU the same list of nodes is walked in order.",
        "The user asks about CPUs.",
    ),
    Intent(
        "batching",
        (
            "What is continuous batching?",
            "How are requests batched?",
            "Explain continuous batching.",
            "When can a request join the batch?",
        ),
        "Requests join and leave the batch at every step, so none waits for a whole batch to end.",
        "The user asks about batching.",
    ),
    Intent(
        "prefix",
        (
            "What is prefix caching?",
            "How does prefix caching work?",
            "Explain prefix caching.",
            "Are prompts cached?",
        ),
        "Full KV blocks are hashed and kept, so a prompt that starts like an earlier one reuses "
        "them.",
        "The user asks about prefix caching.",
    ),
    Intent(
        "tensor-parallel",
        (
            "What is tensor parallelism?",
            "How does tensor parallelism work?",
            "Explain tensor parallelism.",
            "Can it use several GPUs?",
        ),
        "Each rank holds a shard of the heads, the FFN columns and the vocabulary, and "
        "collectives join the results.",
        "The user asks about several devices.",
    ),
    Intent(
        "kv",
        (
            "What is the KV cache?",
            "How is the KV cache stored?",
            "Explain the KV cache.",
            "What is a KV block?",
        ),
        "The KV cache keeps the keys and values of past tokens in blocks of a fixed size.",
        "The user asks about the KV cache.",
    ),
    Intent(
        "static",
        (
            "Why is the engine static?",
            "What does static mean here?",
            "Why decide everything in advance?",
            "Why is Refrain fast?",
        ),
        "Everything is decided before the first token, so each token costs only its own work.",
        "The user asks why the engine is static.",
    ),
    Intent(
        "bucket",
        (
            "What is a bucket?",
            "What are buckets for?",
            "Explain buckets.",
            "Why are batches padded?",
        ),
        "A bucket is a batch size with its own captured graph, and a batch is padded to the "
        "next one.",
        "The user asks about buckets.",
    ),
    Intent(
        "fused",
        (
            "What is a fused node?",
            "What does fused mean?",
            "Why are nodes fused?",
            "Explain fused nodes.",
        ),
        "A fused node does several operations at once, so data stays in registers.",
        "The user asks about fusion.",
    ),
    Intent(
        "prefill",
        ("What is prefill?", "Explain prefill.", "How is a prompt read?"),
        "Prefill reads the prompt in chunks and fills the KV cache.",
        "The user asks about prefill.",
    ),
    Intent(
        "decode",
        ("What is decode?", "Explain decoding.", "How is text generated?"),
        "Decode makes one token per step for every running request.",
        "The user asks about decoding.",
    ),
    Intent(
        "models",
        (
            "Which models does Refrain run?",
            "What models are supported?",
            "Which architecture does Refrain support?",
        ),
        "Refrain runs models of the Qwen2 architecture.",
        "The user asks about models.",
    ),
    Intent(
        "written",
        (
            "In which language is Refrain written?",
            "What is Refrain written in?",
            "Is Refrain written in Python?",
        ),
        "Refrain is written in C and CUDA, with Python bindings.",
        "The user asks about the source code.",
    ),
    Intent(
        "name",
        (
            "Why is it called Refrain?",
            "What does the name Refrain mean?",
            "Where does the name Refrain come from?",
        ),
        "A refrain is the part of a song that repeats, as the engine repeats its step.",
        "The user asks about the name.",
    ),
)

ENGINE_ZH = (
    Intent(
        "refrain-zh",
        ("Refrain 是什么？", "这个引擎是什么？", "介绍一下 Refrain。"),
        "Refrain 是一个用 C 和 CUDA 写的静态推理引擎。",
        "用户问 Refrain 是什么。",
    ),
    Intent(
        "how-zh",
        ("Refrain 怎么工作？", "这个引擎怎么工作？", "请解释引擎的原理。"),
        "规划器先安排好内存，每一步是一个短程序，每个词元都重放它。",
        "用户问引擎的原理。",
    ),
    Intent(
        "planner-zh",
        ("规划器做什么？", "规划器是什么？", "请解释规划器。"),
        "规划器把权重、激活和固定长度的 KV 缓存放进一块内存。",
        "用户问规划器。",
    ),
    Intent(
        "gpu-zh",
        ("在 GPU 上怎么运行？", "怎么使用 CUDA 图？", "GPU 上会发生什么？"),
        "在 GPU 上，程序被捕获为 CUDA 图，每个词元重放一次。",
        "用户问 GPU。",
    ),
    Intent(
        "cpu-zh",
        ("在 CPU 上怎么运行？", "没有 GPU 可以用吗？", "CPU 上会发生什么？"),
        "在 CPU 上，同一个程序按顺序执行。",
        "用户问 CPU。",
    ),
    Intent(
        "batching-zh",
        ("什么是连续批处理？", "请解释连续批处理。", "请求怎么组成批次？"),
        "请求在每一步都可以加入或离开批次。",
        "用户问批处理。",
    ),
    Intent(
        "prefix-zh",
        ("什么是前缀缓存？", "请解释前缀缓存。", "提示词会被缓存吗？"),
        "相同前缀的 KV 块会被保留并重复使用。",
        "用户问前缀缓存。",
    ),
    Intent(
        "parallel-zh",
        ("什么是张量并行？", "请解释张量并行。", "可以用多个 GPU 吗？"),
        "每个设备保存一部分权重，再合并结果。",
        "用户问张量并行。",
    ),
)

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
DAYS_ZH = tuple("星期" + c for c in "一二三四五六日")
MONTHS_ZH = (
    "一月",
    "二月",
    "三月",
    "四月",
    "五月",
    "六月",
    "七月",
    "八月",
    "九月",
    "十月",
    "十一月",
    "十二月",
)

# (phrasing, offset): "{x}" is the known day or month, the answer lies `offset` places further.
DAY_ASKS = (
    ("What day comes after {x}?", 1),
    ("Which day follows {x}?", 1),
    ("What is the day after {x}?", 1),
    ("Today is {x}. What day is tomorrow?", 1),
    ("If today is {x}, what is tomorrow?", 1),
    ("What day comes before {x}?", -1),
    ("Which day is just before {x}?", -1),
    ("What is the day before {x}?", -1),
    ("Today is {x}. What day was yesterday?", -1),
    ("If today is {x}, what was yesterday?", -1),
    ("Which day is two days after {x}?", 2),
    ("What day is it two days after {x}?", 2),
)
MONTH_ASKS = (
    ("What month comes after {x}?", 1),
    ("Which month follows {x}?", 1),
    ("What is the month after {x}?", 1),
    ("It is {x} now. What is the next month?", 1),
    ("What month comes before {x}?", -1),
    ("Which month is just before {x}?", -1),
    ("What is the month before {x}?", -1),
    ("It is {x} now. What was the last month?", -1),
)
DAY_ASKS_ZH = (
    ("{x}后面是星期几？", 1),
    ("今天是{x}，明天是星期几？", 1),
    ("{x}的后一天是什么？", 1),
    ("{x}前面是星期几？", -1),
    ("今天是{x}，昨天是星期几？", -1),
    ("{x}的前一天是什么？", -1),
)
MONTH_ASKS_ZH = (
    ("{x}后面是几月？", 1),
    ("现在是{x}，下个月是几月？", 1),
    ("{x}前面是几月？", -1),
    ("现在是{x}，上个月是几月？", -1),
)

WORDS = _words(
    """apple lemon bread sugar water river stone cloud storm green house table chair door garden
    tree forest ocean bridge train ship horse tiger mouse sheep music song piano drum dance paper
    book story poem number arena kernel token graph cache batch memory engine model block weight
    queue server thread vector summer winter spring light shadow silver iron doctor friend happy
    quick brave gentle refrain"""
)
SPELL_ASKS = (
    'Spell "{x}".',
    "How do you spell {x}?",
    "Spell the word {x}.",
    'How is "{x}" spelled?',
    'Can you spell "{x}"?',
    "What letters are in the word {x}?",
    "Please spell {x}.",
)

COLOURS = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "black",
    "white",
    "grey",
    "silver",
    "golden",
    "violet",
    "turquoise",
    "crimson",
)
THINGS = {
    "the sky": "blue",
    "the sea": "blue",
    "grass": "green",
    "a leaf": "green",
    "a frog": "green",
    "a cucumber": "green",
    "snow": "white",
    "milk": "white",
    "salt": "white",
    "a swan": "white",
    "coal": "black",
    "a raven": "black",
    "the night": "black",
    "ink": "black",
    "blood": "red",
    "a tomato": "red",
    "a strawberry": "red",
    "a ruby": "red",
    "a fire engine": "red",
    "a lemon": "yellow",
    "a banana": "yellow",
    "the sun": "yellow",
    "a canary": "yellow",
    "a carrot": "orange",
    "a pumpkin": "orange",
    "a tangerine": "orange",
    "chocolate": "brown",
    "coffee": "brown",
    "a bear": "brown",
    "soil": "brown",
    "a flamingo": "pink",
    "a pig": "pink",
    "an aubergine": "purple",
    "lavender": "purple",
    "an elephant": "grey",
    "ash": "grey",
    "an emerald": "green",
    "a sapphire": "blue",
    "a polar bear": "white",
    "a lobster": "red",
}
COLOUR_ASKS = (
    "What colour is {x}?",
    "Which colour is {x}?",
    "What is the colour of {x}?",
    "Tell me the colour of {x}.",
    "What color is {x}?",
    "Do you know what colour {x} is?",
)
THINGS_ZH = {
    "天空": "蓝色",
    "大海": "蓝色",
    "草": "绿色",
    "树叶": "绿色",
    "青蛙": "绿色",
    "雪": "白色",
    "牛奶": "白色",
    "盐": "白色",
    "煤": "黑色",
    "乌鸦": "黑色",
    "血": "红色",
    "西红柿": "红色",
    "草莓": "红色",
    "柠檬": "黄色",
    "香蕉": "黄色",
    "太阳": "黄色",
    "胡萝卜": "橙色",
    "南瓜": "橙色",
    "巧克力": "棕色",
    "咖啡": "棕色",
    "茄子": "紫色",
    "大象": "灰色",
}
COLOUR_ASKS_ZH = (
    "{x}是什么颜色？",
    "{x}的颜色是什么？",
    "请问{x}是什么颜色的？",
    "告诉我{x}的颜色。",
)

CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "England": "London",
    "Scotland": "Edinburgh",
    "Ireland": "Dublin",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Poland": "Warsaw",
    "Austria": "Vienna",
    "Hungary": "Budapest",
    "Greece": "Athens",
    "Turkey": "Ankara",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Ghana": "Accra",
    "Morocco": "Rabat",
    "Japan": "Tokyo",
    "China": "Beijing",
    "South Korea": "Seoul",
    "India": "New Delhi",
    "Thailand": "Bangkok",
    "Vietnam": "Hanoi",
    "Mongolia": "Ulaanbaatar",
    "Russia": "Moscow",
    "Ukraine": "Kyiv",
    "Canada": "Ottawa",
    "Mexico": "Mexico City",
    "Brazil": "Brasilia",
    "Argentina": "Buenos Aires",
    "Chile": "Santiago",
    "Peru": "Lima",
    "Cuba": "Havana",
    "Colombia": "Bogota",
    "Australia": "Canberra",
    "New Zealand": "Wellington",
    "Iceland": "Reykjavik",
    "Belgium": "Brussels",
    "Switzerland": "Bern",
    "Croatia": "Zagreb",
    "Serbia": "Belgrade",
    "Romania": "Bucharest",
    "Bulgaria": "Sofia",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Indonesia": "Jakarta",
}
CAPITAL_ASKS = (
    "What is the capital of {x}?",
    "What's the capital of {x}?",
    "Name the capital of {x}.",
    "Which city is the capital of {x}?",
    "Tell me the capital of {x}.",
    "Do you know the capital of {x}?",
    "The capital of {x}?",
)
CAPITALS_ZH = {
    "中国": "北京",
    "日本": "东京",
    "韩国": "首尔",
    "法国": "巴黎",
    "德国": "柏林",
    "英国": "伦敦",
    "意大利": "罗马",
    "西班牙": "马德里",
    "葡萄牙": "里斯本",
    "俄罗斯": "莫斯科",
    "美国": "华盛顿",
    "加拿大": "渥太华",
    "巴西": "巴西利亚",
    "埃及": "开罗",
    "印度": "新德里",
    "泰国": "曼谷",
    "越南": "河内",
    "希腊": "雅典",
    "瑞典": "斯德哥尔摩",
    "挪威": "奥斯陆",
    "澳大利亚": "堪培拉",
    "波兰": "华沙",
}
CAPITAL_ASKS_ZH = (
    "{x}的首都是哪里？",
    "{x}的首都是什么？",
    "{x}的首都在哪里？",
    "请问{x}的首都是哪座城市？",
    "告诉我{x}的首都。",
)

ADD_ASKS = (
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "{a} + {b} = ?",
    "{a}+{b}",
    "Calculate {a} + {b}.",
    "Add {a} and {b}.",
    "How much is {a} plus {b}?",
    "What do you get if you add {a} and {b}?",
    "Compute {a} + {b}.",
)
SUB_ASKS = (
    "What is {a} - {b}?",
    "What is {a} minus {b}?",
    "{a} - {b} = ?",
    "{a}-{b}",
    "Calculate {a} - {b}.",
    "Subtract {b} from {a}.",
    "How much is {a} minus {b}?",
    "Compute {a} - {b}.",
)
MUL_ASKS = (
    "What is {a} × {b}?",
    "What is {a} times {b}?",
    "{a} × {b} = ?",
    "{a}*{b}",
    "Calculate {a} × {b}.",
    "Multiply {a} by {b}.",
    "How much is {a} times {b}?",
    "Compute {a} * {b}.",
)
ADD_ASKS_ZH = ("{a}加{b}等于多少？", "{a} + {b} 等于几？", "请计算{a}加{b}。", "{a}+{b}=？")
SUB_ASKS_ZH = ("{a}减{b}等于多少？", "{a} - {b} 等于几？", "请计算{a}减{b}。", "{a}-{b}=？")
MUL_ASKS_ZH = ("{a}乘{b}等于多少？", "{a} × {b} 等于几？", "请计算{a}乘以{b}。", "{a}×{b}=？")

COUNT_UP = (
    "Count from {a} to {b}.",
    "Count up from {a} to {b}.",
    "Can you count from {a} to {b}?",
    "Count from {a} up to {b}.",
    "List the numbers from {a} to {b}.",
)
COUNT_DOWN = (
    "Count down from {a} to {b}.",
    "Count backwards from {a} to {b}.",
    "Count from {a} down to {b}.",
    "Can you count down from {a} to {b}?",
    "Count from {a} to {b}.",
)
COUNT_UP_ZH = ("从{a}数到{b}。", "请从{a}数到{b}。", "你能从{a}数到{b}吗？")
COUNT_DOWN_ZH = ("从{a}倒数到{b}。", "请从{a}倒着数到{b}。", "你能从{a}倒数到{b}吗？")

NAMES = _words(
    """Alice Anna Amir Ben Bella Boris Carla Carlos Chloe Clara Daniel David Diana Dora Edgar Elena
    Elias Emma Erik Eva Felix Fiona Frank Freya George Grace Greta Hannah Harry Helen Henry Hugo Ida
    Igor Ines Irene Isaac Ivan Jack James Jane Jasper Joan John Julia Karl Kate Kenji Lara Laura Leo
    Lena Liam Lily Linda Louis Lucas Lucy Maria Mark Martha Martin Mary Max Maya Mei Mia Milo Mona
    Nadia Naomi Nico Nina Noah Nora Olga Oliver Omar Oscar Otto Paul Paula Pedro Peter Petra Philip
    Priya Quinn Rachel Ravi Rita Robert Rosa Ruth Sam Sara Selma Simon Sofia Stella Stefan Tania
    Theo Thomas Tina Tom Uma Vera Victor Viola Walter Wanda Wei William Xenia Yara Yusuf Zara
    Zoe"""
)
ONSETS = _words("b c d f g h j k l m n p r s t v w z br ch dr fl gr kl pr sh sl st th tr")
VOWELS = _words("a e i o u ai ea ia io oo")
CODAS = _words("n r s l m x th ck rd nd") + ("", "", "", "", "")
SURNAMES_ZH = tuple("王李张刘陈杨赵黄周吴徐孙马朱胡林郭何高罗")
GIVEN_ZH = tuple("明华丽伟芳娜静敏强磊军洋勇艳杰娟涛超兰霞平刚桂英文玉红云春雪梅山海天宇晨阳")
FOODS = (
    "pizza",
    "rice",
    "soup",
    "pasta",
    "salad",
    "sushi",
    "curry",
    "bread",
    "cheese",
    "cake",
    "noodles",
    "dumplings",
    "pancakes",
    "tofu",
    "beans",
    "chocolate",
    "fish",
    "porridge",
    "apples",
    "grapes",
)
FOODS_ZH = (
    "米饭",
    "面条",
    "饺子",
    "包子",
    "豆腐",
    "鱼",
    "苹果",
    "蛋糕",
    "面包",
    "火锅",
    "西瓜",
    "馒头",
)
COLOURS_ZH = (
    "红色",
    "橙色",
    "黄色",
    "绿色",
    "蓝色",
    "紫色",
    "黑色",
    "白色",
    "灰色",
    "棕色",
    "粉色",
    "金色",
)


class Memory(NamedTuple):
    """Something a user may tell about themselves: ways to say it, and to ask for it later."""

    name: str
    tells: tuple[str, ...]
    reply: str
    asks: tuple[str, ...]
    answer: str
    unknown: str


MEMORY_EN = (
    Memory(
        "name",
        (
            "My name is {v}.",
            "I am {v}.",
            "I'm {v}.",
            "Call me {v}.",
            "My name's {v}.",
            "You can call me {v}.",
            "Hello, my name is {v}.",
        ),
        "Nice to meet you, {v}!",
        (
            "What is my name?",
            "What's my name?",
            "Do you remember my name?",
            "Who am I?",
            "What did I say my name was?",
            "Can you tell me my name?",
        ),
        "Your name is {v}.",
        "You have not told me your name.",
    ),
    Memory(
        "colour",
        (
            "My favourite colour is {v}.",
            "I like {v} the most.",
            "I love the colour {v}.",
            "The colour I like best is {v}.",
        ),
        "I will remember that your favourite colour is {v}.",
        (
            "What is my favourite colour?",
            "Which colour do I like?",
            "Do you remember my favourite colour?",
            "What colour did I say I like?",
        ),
        "Your favourite colour is {v}.",
        "You have not told me your favourite colour.",
    ),
    Memory(
        "city",
        ("I live in {v}.", "My home is in {v}.", "I am living in {v}.", "My city is {v}."),
        "So you live in {v}.",
        (
            "Where do I live?",
            "Which city do I live in?",
            "Do you remember where I live?",
            "What is my city?",
        ),
        "You live in {v}.",
        "You have not told me where you live.",
    ),
    Memory(
        "pet",
        (
            "My dog is called {v}.",
            "I have a dog named {v}.",
            "My dog's name is {v}.",
            "The name of my dog is {v}.",
        ),
        "I will remember that your dog is called {v}.",
        (
            "What is my dog called?",
            "What is the name of my dog?",
            "What is my dog's name?",
            "Do you remember the name of my dog?",
        ),
        "Your dog is called {v}.",
        "You have not told me the name of your dog.",
    ),
    Memory(
        "number",
        (
            "My lucky number is {v}.",
            "{v} is my lucky number.",
            "Remember the number {v} for me.",
            "Keep in mind the number {v}.",
        ),
        "I will remember the number {v}.",
        (
            "What is my number?",
            "What is my lucky number?",
            "Which number did I tell you?",
            "Do you remember my number?",
        ),
        "Your number is {v}.",
        "You have not told me a number.",
    ),
    Memory(
        "food",
        (
            "My favourite food is {v}.",
            "The food I like best is {v}.",
            "I love to eat {v}.",
            "I like eating {v}.",
        ),
        "I will remember that you like {v}.",
        (
            "What is my favourite food?",
            "What do I like to eat?",
            "Which food do I like?",
            "Do you remember what I like to eat?",
        ),
        "You like to eat {v}.",
        "You have not told me what you like to eat.",
    ),
)

REPEAT_ASKS = (
    "Repeat after me: {v}.",
    "Say {v}.",
    "Repeat: {v}.",
    "Please repeat {v}.",
    "Echo {v}.",
)
REPEAT_ASKS_ZH = ("请重复：{v}。", "跟我说：{v}。", "请说{v}。")

MEMORY_ZH = (
    Memory(
        "name",
        ("我叫{v}。", "我的名字是{v}。", "你好，我叫{v}。", "我是{v}。"),
        "很高兴认识你，{v}！",
        ("我叫什么名字？", "我的名字是什么？", "你记得我的名字吗？", "我是谁？"),
        "你叫{v}。",
        "你还没有告诉我你的名字。",
    ),
    Memory(
        "colour",
        ("我最喜欢的颜色是{v}。", "我喜欢{v}。", "我最爱{v}。"),
        "好的，我记住了，你喜欢{v}。",
        ("我最喜欢什么颜色？", "我喜欢的颜色是什么？", "你记得我喜欢什么颜色吗？"),
        "你最喜欢{v}。",
        "你还没有告诉我你喜欢什么颜色。",
    ),
    Memory(
        "number",
        ("我的幸运数字是{v}。", "请记住数字{v}。", "我的数字是{v}。"),
        "好的，我记住了，数字是{v}。",
        ("我的数字是多少？", "我的幸运数字是多少？", "你记得我的数字吗？"),
        "你的数字是{v}。",
        "你还没有告诉我数字。",
    ),
    Memory(
        "food",
        ("我最喜欢吃{v}。", "我爱吃{v}。", "我最喜欢的食物是{v}。"),
        "好的，我记住了，你爱吃{v}。",
        ("我最喜欢吃什么？", "我爱吃什么？", "你记得我爱吃什么吗？"),
        "你爱吃{v}。",
        "你还没有告诉我你爱吃什么。",
    ),
)

OPENERS = (
    "Hi! ",
    "Hello! ",
    "Please tell me: ",
    "Quick question: ",
    "I have a question. ",
    "Another one: ",
    "Next question: ",
    "Okay. ",
    "And now: ",
    "Tell me this: ",
)
CLOSERS = (" Thanks!", " Thank you.", " I want to know.", " Be brief.")
OPENERS_ZH = ("你好！", "请问：", "我有一个问题：", "下一个问题：", "好的。", "那么，")
CLOSERS_ZH = ("谢谢！", "请简短回答。", "我想知道。")
HAILS = (" there", ", Refrain", ", my friend", " again", ", little model")
HAILS_ZH = ("，小模型", "，朋友", "，Refrain", "呀")

SYSTEMS = (
    "You are Refrain, a helpful assistant.",
    "You are a helpful assistant.",
    "You are refrain-mini, a small and friendly model.",
    "Answer briefly.",
    "You are a polite assistant who answers in one sentence.",
    "你是一个有用的助手。",
    "Be helpful and honest.",
)
